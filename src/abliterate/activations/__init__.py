"""Step 1: streaming statistics of the residual stream per layer and position. Never knows directions."""
