"""Runtime: modules that compute from packed weights."""
