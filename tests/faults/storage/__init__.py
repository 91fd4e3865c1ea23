"""Files and databases that are damaged, or whose writer is killed."""
