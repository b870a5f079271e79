"""The demo's story: a volume survives the loss of its primary, told and checked step by step."""
