//! The types of requests: those of the virtio specification (section 5.13.6) and those of the split protocol.

use crate::named_numbers;

named_numbers! {
    /// The type of a request, which is its first byte: `VIRTIO_IOMMU_T_*`.
    pub enum RequestType {
        /// Attach an endpoint to a domain.
        Attach = 1 "ATTACH",
        /// Detach an endpoint from its domain.
        Detach = 2 "DETACH",
        /// Map a range of a domain.
        Map = 3 "MAP",
        /// Remove the mappings in a range of a domain.
        Unmap = 4 "UNMAP",
        /// Ask for an endpoint's properties.
        Probe = 5 "PROBE",
        /// Split protocol: reserve a range of I/O virtual addresses.
        Reserve = 0x80 "RESERVE",
        /// Split protocol: lead granules of a reservation to memory.
        Link = 0x81 "LINK",
        /// Split protocol: undo LINK for any granules of a reservation.
        Unlink = 0x82 "UNLINK",
        /// Split protocol: end a reservation.
        Release = 0x83 "RELEASE",
    }
}

impl RequestType {
    /// The number of types.
    pub const COUNT: usize = Self::ALL.len();

    /// Its place in [`RequestType::ALL`].
    pub const fn index(self) -> usize {
        let number = self as usize;
        if self.is_split() { number - Self::Reserve as usize + Self::Probe as usize } else { number - 1 }
    }

    /// Whether it belongs to the split protocol.
    pub const fn is_split(self) -> bool {
        self as u8 >= Self::Reserve as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_names_and_places_lead_back_to_the_type() {
        for (index, &request) in RequestType::ALL.iter().enumerate() {
            assert_eq!(request.index(), index);
            assert_eq!(RequestType::from_number(request as u8), Some(request));
            assert_eq!(RequestType::from_name(request.name()), Some(request));
            assert_eq!(RequestType::from_name(&request.name().to_lowercase()), Some(request));
        }
        let known = (0..=u8::MAX).filter_map(RequestType::from_number);
        assert!(known.eq(RequestType::ALL.iter().copied()));
        assert_eq!(RequestType::from_name("MAPS"), None);
        let split: Vec<_> = RequestType::ALL.iter().filter(|request| request.is_split()).collect();
        assert_eq!(split.len(), 4);
    }
}
