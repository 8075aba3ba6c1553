"""What trainers and readers have of all shards: connections, routes, pulls and pushes, and tables over them."""
