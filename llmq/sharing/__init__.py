"""A finished checkpoint on its way to the Hub: what would go (parcel.py), and sending it (upload.py)."""
