//! The virtio-iommu device over vhost-user. The only place that knows vhost-user and virtqueues.
