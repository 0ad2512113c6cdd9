"""What reward models say of responses: critiques sampled, rewards computed, both in stages."""
