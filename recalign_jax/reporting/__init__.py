"""What runs left in their folders, listed and shown on one page."""
