"""Ready-made tasks on real data, small enough for a laptop."""
