"""Pages to look at: photos with their regions, and statistics with plots."""
