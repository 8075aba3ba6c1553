"""Tables behind gRPC: shards that hold rows, a coordinator that says who holds which, and clients that lose nothing."""
