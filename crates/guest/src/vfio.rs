//! A PCI function in user space, through VFIO's container interface (Documentation/driver-api/vfio.rst).

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use anyhow::{Context, Result, ensure};
use nix::request_code_none;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_TYPE1v2_IOMMU, vfio_iommu_type1_dma_map, vfio_region_info,
};

use crate::{pci, sysfs};

/// Command register in configuration space (PCI 3.0, 6.2.2), and its bits.
pub const PCI_COMMAND: u64 = 0x04;
/// See [`PCI_COMMAND`].
pub const MEMORY_AND_BUS_MASTER: u16 = 0x6;

// VFIO_TYPE is ';' and numbers start at VFIO_BASE, 100; none of them encodes a size.
nix::ioctl_write_int_bad!(vfio_set_iommu, request_code_none!(b';', 102));
nix::ioctl_write_ptr_bad!(vfio_group_set_container, request_code_none!(b';', 104), libc::c_int);
nix::ioctl_write_ptr_bad!(vfio_group_get_device_fd, request_code_none!(b';', 106), libc::c_char);
nix::ioctl_readwrite_bad!(vfio_device_get_region_info, request_code_none!(b';', 108), vfio_region_info);
nix::ioctl_write_ptr_bad!(vfio_iommu_map_dma, request_code_none!(b';', 113), vfio_iommu_type1_dma_map);

/// What a device may do with a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read only.
    Read,
    /// Write only.
    Write,
    /// Both.
    ReadWrite,
}

/// A function that is bound to vfio-pci, with an address space of its own.
pub struct Function {
    container: File,
    /// Held open: closing the group would end the function's use.
    _group: File,
    device: File,
}

impl Function {
    /// Takes the function `bdf` from its driver, gives it to vfio-pci, opens it and lets it do DMA.
    ///
    /// # Errors
    /// The step that failed.
    pub fn open(bdf: &str) -> Result<Self> {
        give_to_vfio(bdf)?;
        // The guest has no interrupt remapping, and VFIO requires that the user accepts that.
        let parameter = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
        fs::write(parameter, "1").with_context(|| format!("Cannot write {parameter}"))?;
        let group = sysfs::link_name(pci::folder(bdf).join("iommu_group"))
            .with_context(|| format!("{bdf} is in no IOMMU group"))?;
        let container = open("/dev/vfio/vfio")?;
        let group = open(&format!("/dev/vfio/{group}"))?;
        let name = CString::new(bdf)?;
        // SAFETY: the descriptors are VFIO's own, and the pointers are to live values of the type each request reads.
        let device = unsafe {
            vfio_group_set_container(group.as_raw_fd(), &container.as_raw_fd())
                .context("VFIO does not take the group into a container")?;
            vfio_set_iommu(container.as_raw_fd(), VFIO_TYPE1v2_IOMMU as i32)
                .context("VFIO does not attach the group to a type 1 IOMMU")?;
            let device = vfio_group_get_device_fd(group.as_raw_fd(), name.as_ptr())
                .with_context(|| format!("VFIO does not open {bdf}"))?;
            File::from_raw_fd(device)
        };
        let function = Self { container, _group: group, device };
        let command = function.region(VFIO_PCI_CONFIG_REGION_INDEX)?.offset + PCI_COMMAND;
        function.device.write_all_at(&MEMORY_AND_BUS_MASTER.to_le_bytes(), command).context("Cannot enable DMA")?;
        Ok(function)
    }

    /// Maps memory of this process for the device's DMA. It stays mapped until the function is dropped.
    ///
    /// # Errors
    /// The kernel's, with the range.
    ///
    /// # Safety
    /// The device may change the memory at any time from now on. No reference to the memory may exist while it does.
    pub unsafe fn map(&self, memory: NonNull<u8>, iova: u64, size: u64, access: Access) -> Result<()> {
        let flags = match access {
            Access::Read => VFIO_DMA_MAP_FLAG_READ,
            Access::Write => VFIO_DMA_MAP_FLAG_WRITE,
            Access::ReadWrite => VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        };
        let argsz = size_of::<vfio_iommu_type1_dma_map>() as u32;
        let request = vfio_iommu_type1_dma_map { argsz, flags, vaddr: memory.as_ptr().addr() as u64, iova, size };
        // SAFETY: the request is a live value of the type the ioctl reads; the caller is responsible for the memory.
        unsafe { vfio_iommu_map_dma(self.container.as_raw_fd(), &request) }
            .with_context(|| format!("VFIO does not map {size:#x} bytes at IOVA {iova:#x} for {access:?}"))?;
        Ok(())
    }

    /// Maps the function's BAR 0 into this process.
    ///
    /// # Errors
    /// If it has none, or it cannot be mapped.
    pub fn bar0(&self) -> Result<Bar> {
        let region = self.region(VFIO_PCI_BAR0_REGION_INDEX)?;
        Bar::map(&self.device, region.offset as i64, region.size as usize)
    }

    fn region(&self, index: u32) -> Result<vfio_region_info> {
        let argsz = size_of::<vfio_region_info>() as u32;
        let mut info = vfio_region_info { argsz, flags: 0, index, cap_offset: 0, size: 0, offset: 0 };
        // SAFETY: a live value of the type that the ioctl reads and writes, with its size in it.
        unsafe { vfio_device_get_region_info(self.device.as_raw_fd(), &mut info) }
            .with_context(|| format!("VFIO does not describe region {index}"))?;
        Ok(info)
    }
}

/// Takes the function `bdf` from its driver, and gives it to vfio-pci.
///
/// # Errors
/// The system's, with what was tried.
pub fn give_to_vfio(bdf: &str) -> Result<()> {
    pci::set_driver_override(bdf, "vfio-pci")?;
    match pci::driver(bdf).as_deref() {
        Some("vfio-pci") => return Ok(()),
        Some(other) => pci::unbind(other, bdf)?,
        None => {}
    }
    pci::bind("vfio-pci", bdf)
}

/// Opens a device node to read and write.
///
/// # Errors
/// The system's, with the path.
pub fn open(path: &str) -> Result<File> {
    OpenOptions::new().read(true).write(true).open(path).with_context(|| format!("Cannot open {path}"))
}

/// A mapped BAR.
pub struct Bar {
    start: NonNull<u8>,
    size: NonZeroUsize,
}

/// A register's type: an integer for which one access of its width is made.
pub trait Register: Copy {}
impl Register for u8 {}
impl Register for u16 {}
impl Register for u32 {}
impl Register for u64 {}

impl Bar {
    /// Maps `size` bytes of a BAR from `offset` of the file that represents it.
    ///
    /// # Errors
    /// If the size is 0, or the kernel refuses.
    pub fn map(file: &File, offset: i64, size: usize) -> Result<Self> {
        let size = NonZeroUsize::new(size).context("The BAR has no bytes")?;
        let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address that the kernel chooses; device memory holds no Rust values.
        let start = unsafe { mmap(None, size, both, MapFlags::MAP_SHARED, file, offset) }
            .with_context(|| format!("Cannot map the {size} bytes of a BAR"))?;
        Ok(Self { start: start.cast(), size })
    }

    /// Reads the register at `offset`.
    ///
    /// # Errors
    /// If it does not lie in the BAR or is not aligned to its size.
    pub fn read<T: Register>(&self, offset: usize) -> Result<T> {
        let register: *mut T = self.register(offset)?;
        // SAFETY: aligned and inside the mapping, as `register` checked; every value of an integer is valid.
        Ok(unsafe { register.read_volatile() })
    }

    /// Writes the register at `offset`.
    ///
    /// # Errors
    /// As for [`Self::read`].
    pub fn write<T: Register>(&self, offset: usize, value: T) -> Result<()> {
        let register: *mut T = self.register(offset)?;
        // SAFETY: aligned and inside the mapping, as `register` checked.
        unsafe { register.write_volatile(value) };
        Ok(())
    }

    fn register<T: Register>(&self, offset: usize) -> Result<*mut T> {
        let inside = offset + size_of::<T>() <= self.size.get() && offset.is_multiple_of(size_of::<T>());
        ensure!(inside, "No register of {} bytes at {offset:#x} in a BAR of {}", size_of::<T>(), self.size);
        // SAFETY: offset is inside the mapping, as just checked.
        Ok(unsafe { self.start.add(offset) }.as_ptr().cast())
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`; registers are reached through `self` only.
        let _ = unsafe { munmap(self.start.cast(), self.size.get()) };
    }
}
