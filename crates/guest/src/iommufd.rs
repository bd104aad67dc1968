//! Memory mapped for a PCI function through iommufd (Documentation/userspace-api/iommufd.rst).

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use anyhow::{Context, Result};
use nix::request_code_none;
use vfio_bindings::bindings::vfio::{vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd};

use crate::{pci, sysfs, vfio};

/// `struct iommu_ioas_alloc`
#[repr(C)]
struct IoasAlloc {
    size: u32,
    flags: u32,
    out_ioas_id: u32,
}

/// `struct iommu_ioas_map`
#[repr(C)]
struct IoasMap {
    size: u32,
    flags: u32,
    ioas_id: u32,
    reserved: u32,
    user_va: u64,
    length: u64,
    iova: u64,
}

/// `struct iommu_hwpt_alloc`
#[repr(C)]
struct HwptAlloc {
    size: u32,
    flags: u32,
    dev_id: u32,
    pt_id: u32,
    out_hwpt_id: u32,
    reserved: u32,
    data_type: u32,
    data_len: u32,
    data_uptr: u64,
    fault_id: u32,
    reserved_2: u32,
}

/// IOMMU_IOAS_MAP_FIXED_IOVA, to read and to write.
const FIXED_IOVA_READ_WRITE: u32 = 0x7;

// Both types are ';' and none of the numbers encodes a size.
nix::ioctl_readwrite_bad!(bind_iommufd, request_code_none!(b';', 118), vfio_device_bind_iommufd);
nix::ioctl_readwrite_bad!(attach_iommufd_pt, request_code_none!(b';', 119), vfio_device_attach_iommufd_pt);
nix::ioctl_readwrite_bad!(ioas_alloc, request_code_none!(b';', 0x81), IoasAlloc);
nix::ioctl_readwrite_bad!(ioas_map, request_code_none!(b';', 0x85), IoasMap);
nix::ioctl_readwrite_bad!(hwpt_alloc, request_code_none!(b';', 0x89), HwptAlloc);

/// An address space of iommufd, and a function that iommufd owns.
pub struct AddressSpace {
    iommufd: File,
    ioas: u32,
    /// Held open: closing it would detach the function.
    device: File,
    device_id: u32,
}

impl AddressSpace {
    /// Takes the function `bdf` from its driver, gives it to vfio-pci and iommufd, and makes an address space.
    ///
    /// # Errors
    /// The step that failed.
    pub fn of(bdf: &str) -> Result<Self> {
        vfio::give_to_vfio(bdf)?;
        // The guest has no interrupt remapping, and iommufd requires that the user accepts that.
        let parameter = "/sys/module/iommufd/parameters/allow_unsafe_interrupts";
        fs::write(parameter, "1").with_context(|| format!("Cannot write {parameter}"))?;
        let name = sysfs::names(pci::folder(bdf).join("vfio-dev")).into_iter().next();
        let name = name.with_context(|| format!("VFIO has no character device for {bdf}"))?;
        let device = vfio::open(&format!("/dev/vfio/devices/{name}"))?;
        let iommufd = vfio::open("/dev/iommu")?;
        let mut bind = vfio_device_bind_iommufd {
            argsz: size_of::<vfio_device_bind_iommufd>() as u32,
            flags: 0,
            iommufd: iommufd.as_raw_fd(),
            out_devid: 0,
            token_uuid_ptr: 0,
        };
        let mut alloc = IoasAlloc { size: size_of::<IoasAlloc>() as u32, flags: 0, out_ioas_id: 0 };
        // SAFETY: the descriptors are VFIO's and iommufd's own, and the pointers are to live values of the type that each
        // request reads and writes, with their sizes in them.
        unsafe {
            bind_iommufd(device.as_raw_fd(), &mut bind).context("VFIO does not bind the function to iommufd")?;
            ioas_alloc(iommufd.as_raw_fd(), &mut alloc).context("iommufd does not make an address space")?;
        }
        Ok(Self { iommufd, ioas: alloc.out_ioas_id, device, device_id: bind.out_devid })
    }

    /// Attaches the function to the address space, in a new domain. What is mapped later is mapped there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn attach(&self) -> Result<()> {
        self.attach_to(self.ioas)
    }

    /// Makes a domain of the address space and what is mapped in it, and attaches the function to that. The IOMMU then
    /// gets all mappings at once.
    ///
    /// # Errors
    /// The kernel's.
    pub fn attach_filled(&self) -> Result<()> {
        let mut alloc = HwptAlloc {
            size: size_of::<HwptAlloc>() as u32,
            flags: 0,
            dev_id: self.device_id,
            pt_id: self.ioas,
            out_hwpt_id: 0,
            reserved: 0,
            data_type: 0,
            data_len: 0,
            data_uptr: 0,
            fault_id: 0,
            reserved_2: 0,
        };
        // SAFETY: a live value of the type that the ioctl reads and writes, without pointers in it.
        unsafe { hwpt_alloc(self.iommufd.as_raw_fd(), &mut alloc) }.context("iommufd does not make a domain")?;
        self.attach_to(alloc.out_hwpt_id)
    }

    fn attach_to(&self, pt_id: u32) -> Result<()> {
        let argsz = size_of::<vfio_device_attach_iommufd_pt>() as u32;
        let mut attach = vfio_device_attach_iommufd_pt { argsz, flags: 0, pt_id, pasid: 0 };
        // SAFETY: a live value of the type that the ioctl reads and writes.
        unsafe { attach_iommufd_pt(self.device.as_raw_fd(), &mut attach) }
            .context("VFIO does not attach the function to the address space")?;
        Ok(())
    }

    /// Maps memory of this process for the device's DMA, to read and write. It stays mapped until this is dropped.
    ///
    /// # Errors
    /// The kernel's, with the range.
    ///
    /// # Safety
    /// The device may change the memory at any time from now on. No reference to the memory may exist while it does.
    pub unsafe fn map(&self, memory: NonNull<u8>, iova: u64, length: u64) -> Result<()> {
        let mut request = IoasMap {
            size: size_of::<IoasMap>() as u32,
            flags: FIXED_IOVA_READ_WRITE,
            ioas_id: self.ioas,
            reserved: 0,
            user_va: memory.as_ptr().addr() as u64,
            length,
            iova,
        };
        // SAFETY: a live value of the type that the ioctl reads and writes; the caller is responsible for the memory.
        unsafe { ioas_map(self.iommufd.as_raw_fd(), &mut request) }
            .with_context(|| format!("iommufd does not map {length:#x} bytes at IOVA {iova:#x}"))?;
        Ok(())
    }
}
