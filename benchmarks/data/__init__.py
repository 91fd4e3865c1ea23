"""Real data sets, and inputs made of them."""
