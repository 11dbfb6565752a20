"""Region features in other people's formats, to shards and back."""
