"""`manyforms plan`: what a run would cost on GPUs that are not there."""
