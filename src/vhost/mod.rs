//! The virtio-iommu device over vhost-user. The only place that knows vhost-user and virtqueues.

/// The request queue and the event queue (virtio specification, section 5.13.2).
pub const QUEUES: usize = 2;

/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 256;
