"""What is in a file or a folder, what quantization did to each linear, and pictures of what the linears see."""
