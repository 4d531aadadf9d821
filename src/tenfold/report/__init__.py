"""What a comparison says: sentences, pictures, one page."""
