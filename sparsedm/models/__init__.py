"""What is made sparse: U-ViT, the classes of diffusers, the papers' configurations."""
