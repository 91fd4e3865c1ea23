"""What every request passes before its route: who asks, how much, how long, and what is recorded."""
