"""Where content is kept: bytes by digest in an OCI image layout, what is known of them in a catalog."""
