"""From every accepted conversation file to the one Conversation type. References only: no voxel is read here."""
