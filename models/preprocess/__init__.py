"""Preprocessing of images and texts into network inputs."""
