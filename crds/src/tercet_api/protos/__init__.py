"""Generated from `crds/proto/`: agent_pb2, attach_pb2 and their gRPC stubs."""
