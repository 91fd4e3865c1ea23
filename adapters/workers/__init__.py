"""The processes that do jobs: who claims them, where they run, and who keeps them running."""
