"""How the service is deployed: its image, a proxy in front of replicas, and a cluster on one machine."""
