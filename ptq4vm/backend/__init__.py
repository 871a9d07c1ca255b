"""Runs graphs: native libraries, Triton kernels, torch.compile, AOTInductor packages."""
