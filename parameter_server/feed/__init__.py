"""The serving feed: a stream of changed rows, and readers that keep a copy of them."""
