"""What is reported beside what is true."""
