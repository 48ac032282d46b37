"""Step 2: candidates, the causal choice among them, and the direction's file. Never knows how weights are stored."""
