"""The export folders of backbones: where they are stored, and what lies in them."""
