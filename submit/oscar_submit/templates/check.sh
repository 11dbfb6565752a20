#!/bin/bash
# Written by oscar-submit. Counts what the workers have written and fails if shards are missing.
{{directives}}

{{begin}}
tell_to_end() {
    kill -TERM "$child" 2>/dev/null
}

run {{command}}
