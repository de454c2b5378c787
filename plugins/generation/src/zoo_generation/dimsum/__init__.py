"""DiMSUM: spatial-frequency diffusion Mamba (arXiv 2411.04168). The model, its flow, and images from it."""
