"""What is checked on each node of a job before it is used."""
