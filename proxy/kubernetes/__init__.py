"""Which images the objects of Kubernetes manifests and kustomizations name, and how they are to be pulled."""
