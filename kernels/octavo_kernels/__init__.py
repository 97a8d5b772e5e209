"""Device operations of the engine: a torch reference, C++ for the CPU, CUDA to come."""
