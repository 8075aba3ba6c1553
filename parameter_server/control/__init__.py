"""The control plane: the coordinator and the shards as protobuf services over gRPC, and their clients."""
