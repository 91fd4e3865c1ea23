"""The fitting processes, their heartbeats, and turns by tenant."""
