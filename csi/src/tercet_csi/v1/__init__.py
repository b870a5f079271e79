"""Generated from the CSI specification's csi.proto: csi_pb2 and csi_pb2_grpc."""
