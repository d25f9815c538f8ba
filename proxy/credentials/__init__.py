"""What proves to a registry who asks: pull secrets, helper programs, provider plugins."""
