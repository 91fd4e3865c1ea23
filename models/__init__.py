"""The frozen side: backbones, their preprocessing, and the queue in front of them."""
