"""What other libraries profit from, each behind one import."""
