"""csrc/cuda/flash_attention_sm90.cu under the host emulator: TMA, wgmma and barriers as the PTX ISA documents them."""
