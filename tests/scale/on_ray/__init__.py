"""Jobs on the nodes of a Ray cluster whose processes are killed and frozen."""
