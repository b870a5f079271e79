"""Generated from `node-daemon/proto/`: engine_pb2 and its gRPC stubs."""
