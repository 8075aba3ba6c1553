"""A shard: rows that are pulled and pushed, each push applied once and kept as promised; no gRPC in here."""
