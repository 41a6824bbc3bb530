"""What an attribution hides, and from whom."""
