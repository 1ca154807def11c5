"""KV kept between calls, in tiers: the device's memory, the host's, and files."""
