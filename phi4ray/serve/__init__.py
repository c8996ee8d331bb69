"""Online serving: what stands around a replica, and the policies of the fleet."""
