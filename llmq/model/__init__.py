"""The float model: built without weights, filled block by block, its weights changed as they are read."""
