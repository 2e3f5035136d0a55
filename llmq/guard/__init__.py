"""What strangers wrote, read safely: data within limits (reading.py), patterns and code that cannot hang."""
