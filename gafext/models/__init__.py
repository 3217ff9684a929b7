"""Networks: multi-view U-Net, autoencoder, CLIP encoders, latent upsampler, with the checkpoints' key names."""
