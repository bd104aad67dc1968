// SPDX-License-Identifier: GPL-2.0
/*
 * Tests of the DMA API in two steps, on a DMA engine behind an IOMMU
 *
 * Everything that is linked is read or written by the engine. Without an engine
 * that copies memory, or if it is not behind an IOMMU, the tests are skipped.
 */
#include <linux/completion.h>
#include <linux/dmaengine.h>
#include <linux/dma-mapping.h>
#include <linux/iommu.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/pci.h>
#include <linux/random.h>
#include <linux/slab.h>

#include <kunit/test.h>

/* Without SPARSEMEM nothing says how far memory can reach */
#ifndef MAX_PHYSMEM_BITS
#define MAX_PHYSMEM_BITS	BITS_PER_TYPE(phys_addr_t)
#endif

#define NR_SMALL	32
#define NR_LARGE	600
/* As many extents as one request to a virtio-iommu holds */
#define NR_COUNTED	512
/* Tags of allocations whose requests are to be counted in a device's trace */
#define TAG_MANY	DMA_IOVA_TAG(DMA_IOVA_FLOW_NONE, 0x1051)
#define TAG_FAULTS	DMA_IOVA_TAG(DMA_IOVA_FLOW_NONE, 0x1052)
#define TAG_BATCH	DMA_IOVA_TAG(DMA_IOVA_FLOW_NONE, 0x1053)
/* A buffer that begins and ends inside a granule */
#define UNALIGNED_PAD	0x210
#define UNALIGNED_REST	0x630
#define UNALIGNED_SIZE	(2 * PAGE_SIZE - UNALIGNED_PAD + UNALIGNED_REST)
/* What every engine copies at once */
#define COPY_MAX	SZ_32K

static struct dma_chan *chan;

struct iova_test {
	struct device *dev;
	size_t granule;
	/* What a test has changed */
	bool untrusted;
	unsigned int min_align_mask;
};

/* Pages that are not contiguous, with random contents, and what is in them */
struct pages {
	unsigned int nr;
	struct page **page;
	u8 *copy;
};

static void free_scattered(void *data)
{
	struct pages *p = data;
	unsigned int i;

	for (i = 0; i < 2 * p->nr; i++)
		if (p->page[i])
			__free_page(p->page[i]);
	kvfree(p->page);
	kvfree(p->copy);
}

static struct pages *alloc_scattered(struct kunit *test, unsigned int nr)
{
	struct pages *p = kunit_kzalloc(test, sizeof(*p), GFP_KERNEL);
	unsigned int i;

	KUNIT_ASSERT_NOT_NULL(test, p);
	p->page = kvcalloc(2 * nr, sizeof(*p->page), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, p->page);
	p->copy = kvmalloc(nr * PAGE_SIZE, GFP_KERNEL);
	p->nr = nr;
	KUNIT_ASSERT_EQ(test, 0, kunit_add_action_or_reset(test, free_scattered,
							   p));
	KUNIT_ASSERT_NOT_NULL(test, p->copy);

	/* Strewn, so that neighbours are not in order. No 2 * nr is a multiple of 11 */
	for (i = 0; i < 2 * nr; i++) {
		struct page **page = &p->page[i * 11 % (2 * nr)];

		*page = alloc_page(GFP_KERNEL);
		KUNIT_ASSERT_NOT_NULL(test, *page);
	}
	for (i = 0; i < nr; i++) {
		get_random_bytes(page_address(p->page[i]), PAGE_SIZE);
		memcpy(p->copy + i * PAGE_SIZE, page_address(p->page[i]),
		       PAGE_SIZE);
	}
	return p;
}

static phys_addr_t phys_of(struct pages *p, unsigned int i)
{
	return page_to_phys(p->page[i]);
}

/* Have the engine copy from one DMA address to another */
static void engine_copy(struct kunit *test, dma_addr_t to, dma_addr_t from,
			size_t size)
{
	struct dma_async_tx_descriptor *tx;
	dma_cookie_t cookie;
	size_t part;

	for (; size; size -= part, to += part, from += part) {
		part = min_t(size_t, size, COPY_MAX);
		tx = dmaengine_prep_dma_memcpy(chan, to, from, part,
					       DMA_PREP_INTERRUPT);
		KUNIT_ASSERT_NOT_NULL(test, tx);
		cookie = dmaengine_submit(tx);
		KUNIT_ASSERT_FALSE(test, dma_submit_error(cookie));
		KUNIT_ASSERT_EQ(test, DMA_COMPLETE, dma_sync_wait(chan, cookie));
	}
}

/* What a device reads at @from, from a range of the test's own */
static void expect_read(struct kunit *test, dma_addr_t from, const u8 *wanted,
			size_t size)
{
	struct iova_test *it = test->priv;
	dma_addr_t to;
	u8 *got;

	got = kmalloc(size, GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, got);
	to = dma_map_single(it->dev, got, size, DMA_FROM_DEVICE);
	KUNIT_ASSERT_FALSE(test, dma_mapping_error(it->dev, to));
	engine_copy(test, to, from, size);
	dma_unmap_single(it->dev, to, size, DMA_FROM_DEVICE);
	KUNIT_EXPECT_TRUE(test, !memcmp(got, wanted, size));
	kfree(got);
}

static void alloc(struct kunit *test, struct dma_iova_state *state,
		  phys_addr_t phys, size_t size)
{
	struct iova_test *it = test->priv;

	/* Must not matter */
	memset(state, 0xa5, sizeof(*state));
	KUNIT_ASSERT_TRUE(test, dma_iova_try_alloc(it->dev, state, phys, size));
}

static void alloc_sparse(struct kunit *test, struct dma_iova_state *state,
			 size_t size)
{
	struct iova_test *it = test->priv;

	alloc(test, state, 0, size);
	if (dma_iova_sparse(state))
		return;
	dma_iova_free(it->dev, state);
	kunit_skip(test, "allocations are not sparse on this IOMMU");
}

static int link_page(struct kunit *test, struct dma_iova_state *state,
		     struct pages *p, unsigned int i)
{
	struct iova_test *it = test->priv;

	return dma_iova_link(it->dev, state, phys_of(p, i), i * PAGE_SIZE,
			     PAGE_SIZE, DMA_TO_DEVICE, 0);
}

/* All pages, with a single sync */
static void link_all(struct kunit *test, struct dma_iova_state *state,
		     struct pages *p)
{
	struct iova_test *it = test->priv;
	unsigned int i;

	for (i = 0; i < p->nr; i++)
		KUNIT_ASSERT_EQ(test, 0, link_page(test, state, p, i));
	KUNIT_ASSERT_EQ(test, 0, dma_iova_sync(it->dev, state, 0,
					       p->nr * PAGE_SIZE));
}

/* Addresses, sizes and offsets; nothing remains of what is freed */
static void iova_test_alloc(struct kunit *test)
{
	struct iova_test *it = test->priv;
	static const size_t sizes[] = { 1, 512, SZ_4K, SZ_4K + 1, SZ_128K,
					SZ_2M - 512, SZ_64M };
	struct dma_iova_state state;
	phys_addr_t phys;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(sizes); i++) {
		for (phys = SZ_1M; phys < SZ_1M + SZ_4K; phys += 0x210) {
			alloc(test, &state, phys, sizes[i]);
			KUNIT_EXPECT_TRUE(test, dma_use_iova(&state));
			KUNIT_EXPECT_EQ(test, sizes[i], dma_iova_size(&state));
			KUNIT_EXPECT_EQ(test, phys & (it->granule - 1),
					state.addr & (it->granule - 1));
			dma_iova_free(it->dev, &state);
		}
	}
}

/* Scattered pages look contiguous to the device, after a single sync */
static void iova_test_link(struct kunit *test, unsigned int nr)
{
	struct iova_test *it = test->priv;
	struct pages *p = alloc_scattered(test, nr);
	struct dma_iova_state state;

	alloc(test, &state, phys_of(p, 0), nr * PAGE_SIZE);
	link_all(test, &state, p);
	expect_read(test, state.addr, p->copy, nr * PAGE_SIZE);
	dma_iova_destroy(it->dev, &state, nr * PAGE_SIZE, DMA_TO_DEVICE, 0);
}

static void iova_test_link_small(struct kunit *test)
{
	iova_test_link(test, NR_SMALL);
}

static void iova_test_link_large(struct kunit *test)
{
	iova_test_link(test, NR_LARGE);
}

#ifdef LINKS_PIECES
/* An array of pages, at no address but one that a page can have */
static void iova_test_link_vec(struct kunit *test)
{
	struct iova_test *it = test->priv;
	struct pages *p = alloc_scattered(test, NR_LARGE);
	size_t size = NR_LARGE * PAGE_SIZE;
	struct dma_iova_state state;
	struct phys_vec *vecs;
	unsigned int i;

	vecs = kunit_kcalloc(test, NR_LARGE, sizeof(*vecs), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, vecs);
	for (i = 0; i < NR_LARGE; i++) {
		vecs[i].paddr = phys_of(p, i);
		vecs[i].len = PAGE_SIZE;
	}

	alloc(test, &state, 0, size);
	KUNIT_EXPECT_EQ(test, -EINVAL,
			dma_iova_link_vec(it->dev, &state, 512, vecs, 1,
					  DMA_TO_DEVICE, 0, 0));
	KUNIT_ASSERT_EQ(test, 0,
			dma_iova_link_vec(it->dev, &state, 0, vecs, NR_LARGE,
					  DMA_TO_DEVICE, 0, 0));
	KUNIT_ASSERT_EQ(test, 0, dma_iova_sync(it->dev, &state, 0, size));
	expect_read(test, state.addr, p->copy, size);
	dma_iova_destroy(it->dev, &state, size, DMA_TO_DEVICE, 0);

	/* An offset can make up for an allocation that begins in a granule */
	alloc(test, &state, 512, size);
	KUNIT_EXPECT_EQ(test, -EINVAL,
			dma_iova_link_vec(it->dev, &state, 0, vecs, 1,
					  DMA_TO_DEVICE, 0, 0));
	KUNIT_EXPECT_EQ(test, 0,
			dma_iova_link_vec(it->dev, &state, PAGE_SIZE - 512,
					  vecs, 2, DMA_TO_DEVICE, 0, 0));
	KUNIT_EXPECT_EQ(test, 0, dma_iova_sync(it->dev, &state, PAGE_SIZE - 512,
					       2 * PAGE_SIZE));
	expect_read(test, state.addr + PAGE_SIZE - 512, p->copy, 2 * PAGE_SIZE);
	dma_iova_unlink(it->dev, &state, PAGE_SIZE - 512, 2 * PAGE_SIZE,
			DMA_TO_DEVICE, 0);
	dma_iova_free(it->dev, &state);
}
#endif

/* A device can write, and only what it should */
static void iova_test_write(struct kunit *test)
{
	struct iova_test *it = test->priv;
	struct pages *from = alloc_scattered(test, NR_SMALL);
	struct pages *to = alloc_scattered(test, NR_SMALL);
	struct dma_iova_state in, out;
	size_t size = NR_SMALL * PAGE_SIZE;
	unsigned int i;

	alloc(test, &in, phys_of(from, 0), size);
	alloc(test, &out, phys_of(to, 0), size);
	for (i = 0; i < NR_SMALL; i++) {
		KUNIT_ASSERT_EQ(test, 0, link_page(test, &in, from, i));
		KUNIT_ASSERT_EQ(test, 0,
				dma_iova_link(it->dev, &out, phys_of(to, i),
					      i * PAGE_SIZE, PAGE_SIZE,
					      DMA_FROM_DEVICE, 0));
	}
	KUNIT_ASSERT_EQ(test, 0, dma_iova_sync(it->dev, &in, 0, size));
	KUNIT_ASSERT_EQ(test, 0, dma_iova_sync(it->dev, &out, 0, size));

	/* All but the first and the last page */
	engine_copy(test, out.addr + PAGE_SIZE, in.addr + PAGE_SIZE,
		    size - 2 * PAGE_SIZE);
	/* This waits in lazy mode, too */
	dma_iova_unlink(it->dev, &out, 0, size, DMA_FROM_DEVICE, 0);
	dma_iova_free(it->dev, &out);
	dma_iova_destroy(it->dev, &in, size, DMA_TO_DEVICE, 0);

	for (i = 0; i < NR_SMALL; i++) {
		struct pages *p = i && i < NR_SMALL - 1 ? from : to;

		KUNIT_EXPECT_TRUE(test, !memcmp(page_address(to->page[i]),
						p->copy + i * PAGE_SIZE,
						PAGE_SIZE));
	}
}

/* A buffer in three pages, and as many links */
static void link_unaligned(struct kunit *test, struct dma_iova_state *state,
			   struct pages *p, enum dma_data_direction dir)
{
	struct iova_test *it = test->priv;

	alloc(test, state, phys_of(p, 0) + UNALIGNED_PAD, UNALIGNED_SIZE);
	KUNIT_EXPECT_EQ(test, 0, dma_iova_link(it->dev, state,
					       phys_of(p, 0) + UNALIGNED_PAD, 0,
					       PAGE_SIZE - UNALIGNED_PAD, dir,
					       0));
	KUNIT_EXPECT_EQ(test, 0, dma_iova_link(it->dev, state, phys_of(p, 1),
					       PAGE_SIZE - UNALIGNED_PAD,
					       PAGE_SIZE, dir, 0));
	KUNIT_EXPECT_EQ(test, 0, dma_iova_link(it->dev, state, phys_of(p, 2),
					       2 * PAGE_SIZE - UNALIGNED_PAD,
					       UNALIGNED_REST, dir, 0));
	KUNIT_ASSERT_EQ(test, 0, dma_iova_sync(it->dev, state, 0,
					       UNALIGNED_SIZE));
}

static void iova_test_unaligned(struct kunit *test)
{
	struct iova_test *it = test->priv;
	struct pages *p = alloc_scattered(test, 3);
	struct dma_iova_state state;

	link_unaligned(test, &state, p, DMA_TO_DEVICE);
	expect_read(test, state.addr, p->copy + UNALIGNED_PAD, UNALIGNED_SIZE);
	dma_iova_destroy(it->dev, &state, UNALIGNED_SIZE, DMA_TO_DEVICE, 0);
}

static void restore_trust(void *data)
{
	struct iova_test *it = data;

	to_pci_dev(it->dev)->untrusted = it->untrusted;
	dma_set_min_align_mask(it->dev, it->min_align_mask);
}

static bool bounces(struct iova_test *it, struct pages *p)
{
	dma_addr_t addr = dma_map_page(it->dev, p->page[0], UNALIGNED_PAD, 1,
				       DMA_TO_DEVICE);

	if (dma_mapping_error(it->dev, addr))
		return false;
	dma_unmap_page(it->dev, addr, 1, DMA_TO_DEVICE);
	return true;
}

/*
 * A device that is not trusted reads and writes copies of what fills part of a
 * granule. It sees nothing that lies beside.
 */
static void iova_test_untrusted(struct kunit *test)
{
	struct iova_test *it = test->priv;
	struct pages *from = alloc_scattered(test, 3);
	struct pages *to = alloc_scattered(test, 3);
	struct dma_iova_state in, out;
	u8 *zeroes, *end = page_address(to->page[2]);

	zeroes = kunit_kzalloc(test, PAGE_SIZE, GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, zeroes);
	if (!dev_is_pci(it->dev))
		kunit_skip(test, "the DMA engine is no PCI device");
	it->untrusted = to_pci_dev(it->dev)->untrusted;
	it->min_align_mask = dma_get_min_align_mask(it->dev);
	KUNIT_ASSERT_EQ(test, 0, kunit_add_action(test, restore_trust, it));
	to_pci_dev(it->dev)->untrusted = true;
	if (!bounces(it, from))
		kunit_skip(test, "no bounce buffers, see swiotlb=force");

	/* A copy would lie elsewhere in its granule than the buffer */
	dma_set_min_align_mask(it->dev, 0);
	KUNIT_EXPECT_FALSE(test, dma_iova_try_alloc(it->dev, &in, UNALIGNED_PAD,
						    UNALIGNED_SIZE));
	dma_set_min_align_mask(it->dev, it->granule - 1);

	link_unaligned(test, &in, from, DMA_TO_DEVICE);
	link_unaligned(test, &out, to, DMA_FROM_DEVICE);
	KUNIT_EXPECT_FALSE(test, dma_iova_sparse(&in));
	expect_read(test, in.addr, from->copy + UNALIGNED_PAD, UNALIGNED_SIZE);
	expect_read(test, in.addr - UNALIGNED_PAD, zeroes, UNALIGNED_PAD);
	expect_read(test, in.addr + UNALIGNED_SIZE, zeroes,
		    PAGE_SIZE - UNALIGNED_REST);

	engine_copy(test, out.addr, in.addr, UNALIGNED_SIZE);
	dma_iova_destroy(it->dev, &in, UNALIGNED_SIZE, DMA_TO_DEVICE, 0);
	dma_iova_destroy(it->dev, &out, UNALIGNED_SIZE, DMA_FROM_DEVICE, 0);

	KUNIT_EXPECT_MEMEQ(test, page_address(to->page[0]), to->copy,
			   UNALIGNED_PAD);
	KUNIT_EXPECT_MEMEQ(test, page_address(to->page[0]) + UNALIGNED_PAD,
			   from->copy + UNALIGNED_PAD,
			   PAGE_SIZE - UNALIGNED_PAD);
	KUNIT_EXPECT_MEMEQ(test, page_address(to->page[1]),
			   from->copy + PAGE_SIZE, PAGE_SIZE);
	KUNIT_EXPECT_MEMEQ(test, end, from->copy + 2 * PAGE_SIZE,
			   UNALIGNED_REST);
	KUNIT_EXPECT_MEMEQ(test, end + UNALIGNED_REST,
			   to->copy + 2 * PAGE_SIZE + UNALIGNED_REST,
			   PAGE_SIZE - UNALIGNED_REST);
}

/* What is linked is unlinked in the same pieces, and linked again, anywhere */
static void iova_test_relink(struct kunit *test)
{
	struct iova_test *it = test->priv;
	struct pages *p = alloc_scattered(test, 4);
	struct dma_iova_state state;
	unsigned int i;

	alloc(test, &state, phys_of(p, 0), 4 * PAGE_SIZE);
	for (i = 0; i < 4; i++)
		KUNIT_ASSERT_EQ(test, 0, link_page(test, &state, p, i));
	KUNIT_ASSERT_EQ(test, 0, dma_iova_sync(it->dev, &state, 0,
					       4 * PAGE_SIZE));
	dma_iova_unlink(it->dev, &state, PAGE_SIZE, PAGE_SIZE, DMA_TO_DEVICE, 0);
	KUNIT_ASSERT_EQ(test, 0, dma_iova_link(it->dev, &state, phys_of(p, 3),
					       PAGE_SIZE, PAGE_SIZE,
					       DMA_TO_DEVICE, 0));
	KUNIT_ASSERT_EQ(test, 0, dma_iova_sync(it->dev, &state, PAGE_SIZE,
					       PAGE_SIZE));
	expect_read(test, state.addr, p->copy, PAGE_SIZE);
	expect_read(test, state.addr + PAGE_SIZE, p->copy + 3 * PAGE_SIZE,
		    PAGE_SIZE);
	expect_read(test, state.addr + 2 * PAGE_SIZE, p->copy + 2 * PAGE_SIZE,
		    2 * PAGE_SIZE);
	dma_iova_destroy(it->dev, &state, 4 * PAGE_SIZE, DMA_TO_DEVICE, 0);
}

/* A page is taken out of the middle of a link, and replaced */
static void iova_test_split(struct kunit *test)
{
	struct iova_test *it = test->priv;
	struct pages *p = alloc_scattered(test, 1);
	struct dma_iova_state state;
	struct page *block;
	u8 *wanted;

	alloc_sparse(test, &state, 8 * PAGE_SIZE);
	block = alloc_pages(GFP_KERNEL, 3);
	KUNIT_ASSERT_NOT_NULL(test, block);
	wanted = page_address(block);
	get_random_bytes(wanted, 8 * PAGE_SIZE);

	KUNIT_ASSERT_EQ(test, 0, dma_iova_link(it->dev, &state,
					       page_to_phys(block), 0,
					       8 * PAGE_SIZE, DMA_TO_DEVICE, 0));
	KUNIT_ASSERT_EQ(test, 0, dma_iova_sync(it->dev, &state, 0,
					       8 * PAGE_SIZE));
	expect_read(test, state.addr, wanted, 8 * PAGE_SIZE);

	dma_iova_unlink(it->dev, &state, 3 * PAGE_SIZE, PAGE_SIZE,
			DMA_TO_DEVICE, 0);
	expect_read(test, state.addr, wanted, 3 * PAGE_SIZE);
	expect_read(test, state.addr + 4 * PAGE_SIZE, wanted + 4 * PAGE_SIZE,
		    4 * PAGE_SIZE);

	KUNIT_ASSERT_EQ(test, 0, dma_iova_link(it->dev, &state, phys_of(p, 0),
					       3 * PAGE_SIZE, PAGE_SIZE,
					       DMA_TO_DEVICE, 0));
	KUNIT_ASSERT_EQ(test, 0, dma_iova_sync(it->dev, &state, 0,
					       8 * PAGE_SIZE));
	expect_read(test, state.addr + 3 * PAGE_SIZE, p->copy, PAGE_SIZE);
	dma_iova_destroy(it->dev, &state, 0, DMA_TO_DEVICE, 0);
	__free_pages(block, 3);
}

/* Every other page, unlinked across the holes, and the rest linked after */
static void iova_test_holes(struct kunit *test)
{
	struct iova_test *it = test->priv;
	struct pages *p = alloc_scattered(test, NR_SMALL);
	size_t size = NR_SMALL * PAGE_SIZE;
	struct dma_iova_state state;
	unsigned int i, round;

	alloc_sparse(test, &state, size);
	for (round = 0; round < 2; round++) {
		for (i = round; i < NR_SMALL; i += 2)
			KUNIT_ASSERT_EQ(test, 0, link_page(test, &state, p, i));
		KUNIT_ASSERT_EQ(test, 0, dma_iova_sync(it->dev, &state, 0,
						       size));
		for (i = round; i < NR_SMALL; i += 2)
			expect_read(test, state.addr + i * PAGE_SIZE,
				    p->copy + i * PAGE_SIZE, PAGE_SIZE);
		dma_iova_unlink(it->dev, &state, 0, size, DMA_TO_DEVICE, 0);
	}

	/* Nothing is left: all of it can be linked */
	link_all(test, &state, p);
	expect_read(test, state.addr, p->copy, size);
	dma_iova_destroy(it->dev, &state, 0, DMA_TO_DEVICE, 0);
}

/* The IOMMU refuses a second link. The error is seen there until it is undone */
static void iova_test_refused(struct kunit *test)
{
	struct iova_test *it = test->priv;
	struct pages *p = alloc_scattered(test, 4);
	struct dma_iova_state state;

	alloc_sparse(test, &state, 4 * PAGE_SIZE);
	KUNIT_ASSERT_EQ(test, 0, link_page(test, &state, p, 0));
	KUNIT_ASSERT_EQ(test, 0, link_page(test, &state, p, 2));
	KUNIT_ASSERT_EQ(test, 0, dma_iova_sync(it->dev, &state, 0,
					       4 * PAGE_SIZE));

	KUNIT_ASSERT_EQ(test, 0, link_page(test, &state, p, 2));
	KUNIT_EXPECT_NE(test, 0, dma_iova_sync(it->dev, &state, 2 * PAGE_SIZE,
					       PAGE_SIZE));
	/* Elsewhere all is well */
	KUNIT_EXPECT_EQ(test, 0, dma_iova_sync(it->dev, &state, 0, PAGE_SIZE));
	KUNIT_EXPECT_NE(test, 0, dma_iova_sync(it->dev, &state, 0,
					       4 * PAGE_SIZE));

	dma_iova_unlink(it->dev, &state, 2 * PAGE_SIZE, PAGE_SIZE,
			DMA_TO_DEVICE, 0);
	KUNIT_ASSERT_EQ(test, 0, link_page(test, &state, p, 2));
	KUNIT_EXPECT_EQ(test, 0, dma_iova_sync(it->dev, &state, 0,
					       4 * PAGE_SIZE));
	expect_read(test, state.addr + 2 * PAGE_SIZE, p->copy + 2 * PAGE_SIZE,
		    PAGE_SIZE);
	dma_iova_destroy(it->dev, &state, 0, DMA_TO_DEVICE, 0);
}

/* Two links fail apart from each other. Between them, nothing has. */
static void iova_test_refused_apart(struct kunit *test)
{
	struct iova_test *it = test->priv;
	struct pages *p = alloc_scattered(test, 4);
	struct dma_iova_state state;
	unsigned int i;

	alloc_sparse(test, &state, 4 * PAGE_SIZE);
	link_all(test, &state, p);
	for (i = 0; i < 4; i += 3)
		KUNIT_ASSERT_EQ(test, 0, link_page(test, &state, p, i));
	KUNIT_EXPECT_NE(test, 0, dma_iova_sync(it->dev, &state, 0,
					       4 * PAGE_SIZE));
	KUNIT_EXPECT_EQ(test, 0, dma_iova_sync(it->dev, &state, PAGE_SIZE,
					       2 * PAGE_SIZE));

	for (i = 0; i < 4; i += 3)
		dma_iova_unlink(it->dev, &state, i * PAGE_SIZE, PAGE_SIZE,
				DMA_TO_DEVICE, 0);
	KUNIT_EXPECT_EQ(test, 0, dma_iova_sync(it->dev, &state, 0,
					       4 * PAGE_SIZE));
	dma_iova_destroy(it->dev, &state, 0, DMA_TO_DEVICE, 0);
}

/* One link fails as a whole, and is unlinked page by page from the middle */
static void iova_test_refused_order(struct kunit *test)
{
	static const unsigned int order[] = { 1, 0, 3, 2 };
	struct iova_test *it = test->priv;
	struct pages *p = alloc_scattered(test, 4);
	struct dma_iova_state state;
	unsigned int i;

	alloc_sparse(test, &state, 4 * PAGE_SIZE);
	link_all(test, &state, p);
	for (i = 0; i < 4; i++)
		KUNIT_ASSERT_EQ(test, 0, link_page(test, &state, p, i));
	KUNIT_EXPECT_NE(test, 0, dma_iova_sync(it->dev, &state, 0,
					       4 * PAGE_SIZE));

	for (i = 0; i < 4; i++) {
		size_t offset = order[i] * PAGE_SIZE;

		dma_iova_unlink(it->dev, &state, offset, PAGE_SIZE,
				DMA_TO_DEVICE, 0);
		KUNIT_EXPECT_EQ(test, 0, dma_iova_sync(it->dev, &state, offset,
						       PAGE_SIZE));
		if (i < 3)
			KUNIT_EXPECT_NE(test, 0,
					dma_iova_sync(it->dev, &state, 0,
						      4 * PAGE_SIZE));
	}
	KUNIT_EXPECT_EQ(test, 0, dma_iova_sync(it->dev, &state, 0,
					       4 * PAGE_SIZE));

	link_all(test, &state, p);
	expect_read(test, state.addr, p->copy, 4 * PAGE_SIZE);
	dma_iova_destroy(it->dev, &state, 4 * PAGE_SIZE, DMA_TO_DEVICE, 0);
}

/* What is no memory is refused if anybody looks, and nothing is left of it */
static void iova_test_no_memory(struct kunit *test)
{
	struct iova_test *it = test->priv;
	struct pages *p = alloc_scattered(test, 1);
	phys_addr_t nowhere = 1ULL << (MAX_PHYSMEM_BITS - 1);
	struct dma_iova_state state;
	int ret;

	if (pfn_valid(PHYS_PFN(nowhere)))
		kunit_skip(test, "there is memory everywhere");

	alloc(test, &state, 0, PAGE_SIZE);
	ret = dma_iova_link(it->dev, &state, nowhere, 0, PAGE_SIZE,
			    DMA_TO_DEVICE, 0);
	if (!ret) {
		dma_iova_destroy(it->dev, &state, PAGE_SIZE, DMA_TO_DEVICE, 0);
		kunit_skip(test, "the DMA API links what it is told");
	}
	KUNIT_EXPECT_EQ(test, -EREMOTEIO, ret);
	KUNIT_ASSERT_EQ(test, 0, link_page(test, &state, p, 0));
	KUNIT_ASSERT_EQ(test, 0, dma_iova_sync(it->dev, &state, 0, PAGE_SIZE));
	expect_read(test, state.addr, p->copy, PAGE_SIZE);
	dma_iova_destroy(it->dev, &state, PAGE_SIZE, DMA_TO_DEVICE, 0);
}

/* When IOVA space is short the answer is no, and it all comes back */
static void iova_test_exhaustion(struct kunit *test)
{
	struct iova_test *it = test->priv;
	struct dma_iova_state states[17];
	u64 mask = dma_get_mask(it->dev);
	unsigned int round, nr, first = 0;

	/* 4 GiB less what is taken already cannot hold 16 of these */
	KUNIT_ASSERT_EQ(test, 0, dma_set_mask(it->dev, DMA_BIT_MASK(32)));
	for (round = 0; round < 3; round++) {
		for (nr = 0; nr < ARRAY_SIZE(states); nr++)
			if (!dma_iova_try_alloc(it->dev, &states[nr], 0,
						SZ_256M))
				break;
		KUNIT_EXPECT_GT(test, nr, 0);
		KUNIT_EXPECT_LT(test, nr, 16);
		if (nr < ARRAY_SIZE(states))
			KUNIT_EXPECT_FALSE(test, dma_use_iova(&states[nr]));
		/* What cases before freed lazily may come back in between */
		KUNIT_EXPECT_GE(test, nr, first);
		first = nr;
		while (nr--)
			dma_iova_free(it->dev, &states[nr]);
	}
	KUNIT_EXPECT_EQ(test, 0, dma_set_mask(it->dev, mask));
}

/* As the kernel's fault injection makes it, for this task */
static void set_memory_short(bool is_short)
{
#ifdef CONFIG_FAULT_INJECTION
	current->make_it_fail = is_short;
#endif
}

/* Unlinking needs no memory. Linking may, but fails for no other reason. */
static void iova_test_memory_short(struct kunit *test)
{
	struct iova_test *it = test->priv;
	struct pages *p = alloc_scattered(test, NR_SMALL);
	size_t size = NR_SMALL * PAGE_SIZE;
	struct dma_iova_state state, other;
	unsigned int i;
	void *memory;
	int ret;

	alloc(test, &state, 0, size);
	link_all(test, &state, p);

	set_memory_short(true);
	memory = kmalloc(SZ_64, GFP_ATOMIC | __GFP_NOWARN);
	if (memory) {
		set_memory_short(false);
		kfree(memory);
		dma_iova_destroy(it->dev, &state, size, DMA_TO_DEVICE, 0);
		kunit_skip(test, "memory is not short, see failslab");
	}

	for (i = 0; i < NR_SMALL; i++)
		dma_iova_unlink(it->dev, &state, i * PAGE_SIZE, PAGE_SIZE,
				DMA_TO_DEVICE, 0);
	ret = link_page(test, &state, p, 1);
	if (!ret) {
		ret = dma_iova_sync(it->dev, &state, PAGE_SIZE, PAGE_SIZE);
		dma_iova_unlink(it->dev, &state, PAGE_SIZE, PAGE_SIZE,
				DMA_TO_DEVICE, 0);
	}
	if (dma_iova_try_alloc(it->dev, &other, 0, size))
		dma_iova_free(it->dev, &other);
	set_memory_short(false);
	KUNIT_EXPECT_TRUE(test, !ret || ret == -ENOMEM);

	/* Had anything stayed linked, the IOMMU would refuse this */
	link_all(test, &state, p);
	expect_read(test, state.addr, p->copy, size);

	set_memory_short(true);
	dma_iova_destroy(it->dev, &state, size, DMA_TO_DEVICE, 0);
	set_memory_short(false);
}

static bool has_iova_space(struct device *dev)
{
	struct dma_iova_state state;

	if (!dma_iova_try_alloc(dev, &state, 0, PAGE_SIZE))
		return false;
	dma_iova_free(dev, &state);
	return true;
}

static struct pci_dev *unbound_function(void)
{
	struct pci_dev *pdev = NULL;

	for_each_pci_dev(pdev)
		if (!pdev->dev.driver && has_iova_space(&pdev->dev))
			break;
	return pdev;
}

/* Whoever owns a device's DMA maps in a domain of its own, past the DMA API */
static void iova_test_owned(struct kunit *test)
{
	struct pages *p = alloc_scattered(test, 1);
	struct dma_iova_state state;
	struct scatterlist sg;
	struct pci_dev *pdev;
	struct device *dev;
	dma_addr_t addr;

	pdev = unbound_function();
	if (!pdev)
		kunit_skip(test, "no PCI function without a driver behind an IOMMU");
	dev = &pdev->dev;
	sg_init_table(&sg, 1);
	sg_set_page(&sg, p->page[0], PAGE_SIZE, 0);

	KUNIT_EXPECT_EQ(test, 0, iommu_device_claim_dma_owner(dev, test));
	KUNIT_EXPECT_FALSE(test, dma_iova_try_alloc(dev, &state, 0, PAGE_SIZE));
	addr = dma_map_page(dev, p->page[0], 0, PAGE_SIZE, DMA_TO_DEVICE);
	KUNIT_EXPECT_TRUE(test, dma_mapping_error(dev, addr));
	KUNIT_EXPECT_EQ(test, 0, dma_map_sg(dev, &sg, 1, DMA_TO_DEVICE));
	iommu_device_release_dma_owner(dev);

	KUNIT_EXPECT_TRUE(test, dma_iova_try_alloc(dev, &state, 0, PAGE_SIZE));
	if (dma_use_iova(&state))
		dma_iova_free(dev, &state);
	addr = dma_map_page(dev, p->page[0], 0, PAGE_SIZE, DMA_TO_DEVICE);
	KUNIT_EXPECT_FALSE(test, dma_mapping_error(dev, addr));
	if (!dma_mapping_error(dev, addr))
		dma_unmap_page(dev, addr, PAGE_SIZE, DMA_TO_DEVICE);
	pci_dev_put(pdev);
}

struct worker {
	struct device *dev;
	struct dma_iova_state *shared;
	struct pages *pages;
	unsigned int first, nr;
	int failures;
	struct completion done;
};

/* Link and unlink pages of one's own, in a shared and in an own allocation */
static int worker_fn(void *data)
{
	struct worker *w = data;
	struct dma_iova_state own;
	unsigned int i, round;
	size_t offset;

	for (round = 0; round < 200; round++) {
		for (i = w->first; i < w->first + w->nr; i++)
			w->failures += !!dma_iova_link(w->dev, w->shared,
						       phys_of(w->pages, i),
						       i * PAGE_SIZE, PAGE_SIZE,
						       DMA_TO_DEVICE, 0);
		offset = w->first * PAGE_SIZE;
		w->failures += !!dma_iova_sync(w->dev, w->shared, offset,
					       w->nr * PAGE_SIZE);
		dma_iova_unlink(w->dev, w->shared, offset, w->nr * PAGE_SIZE,
				DMA_TO_DEVICE, 0);

		if (!dma_iova_try_alloc(w->dev, &own, 0, w->nr * PAGE_SIZE)) {
			w->failures++;
			continue;
		}
		w->failures += !!dma_iova_link(w->dev, &own,
					       phys_of(w->pages, w->first), 0,
					       PAGE_SIZE, DMA_TO_DEVICE, 0);
		w->failures += !!dma_iova_sync(w->dev, &own, 0, PAGE_SIZE);
		dma_iova_destroy(w->dev, &own, PAGE_SIZE, DMA_TO_DEVICE, 0);
		cond_resched();
	}
	/* The module may go when that is known */
	kthread_complete_and_exit(&w->done, 0);
}

/* Two CPUs in one domain, and in one allocation */
static void iova_test_two_cpus(struct kunit *test)
{
	struct iova_test *it = test->priv;
	struct pages *p = alloc_scattered(test, NR_SMALL);
	struct dma_iova_state state;
	struct worker w[2] = {};
	struct task_struct *task;
	unsigned int i;

	if (num_online_cpus() < 2)
		kunit_skip(test, "only one CPU");

	alloc(test, &state, 0, NR_SMALL * PAGE_SIZE);
	for (i = 0; i < 2; i++) {
		w[i].dev = it->dev;
		w[i].shared = &state;
		w[i].pages = p;
		w[i].nr = NR_SMALL / 2;
		w[i].first = i * w[i].nr;
		init_completion(&w[i].done);
		task = kthread_create(worker_fn, &w[i], "iova_test/%u", i);
		if (IS_ERR(task)) {
			complete(&w[i].done);
			w[i].failures++;
			continue;
		}
		kthread_bind(task, cpumask_nth(i, cpu_online_mask));
		wake_up_process(task);
	}
	for (i = 0; i < 2; i++) {
		wait_for_completion(&w[i].done);
		KUNIT_EXPECT_EQ(test, 0, w[i].failures);
	}

	/* Nothing is left behind */
	link_all(test, &state, p);
	expect_read(test, state.addr, p->copy, NR_SMALL * PAGE_SIZE);
	dma_iova_destroy(it->dev, &state, NR_SMALL * PAGE_SIZE, DMA_TO_DEVICE,
			 0);
}

static void alloc_counted(struct kunit *test, struct dma_iova_state *state,
			  u64 tag)
{
	struct iova_test *it = test->priv;

	KUNIT_ASSERT_TRUE(test, dma_iova_try_alloc_tagged(it->dev, state, 0,
							  NR_COUNTED * PAGE_SIZE,
							  tag));
	if (dma_iova_sparse(state))
		return;
	dma_iova_free(it->dev, state);
	kunit_skip(test, "allocations are not sparse on this IOMMU");
}

/*
 * Many pages at once, then one taken from the middle: a device that traces its
 * requests should see one that reserves, one that links and one that unlinks
 */
static void iova_test_count_many(struct kunit *test)
{
	struct iova_test *it = test->priv;
	struct pages *p = alloc_scattered(test, NR_COUNTED);
	const size_t middle = NR_COUNTED / 2 * PAGE_SIZE;
	struct dma_iova_state state;

	alloc_counted(test, &state, TAG_MANY);
	link_all(test, &state, p);
	expect_read(test, state.addr, p->copy, NR_COUNTED * PAGE_SIZE);

	dma_iova_unlink(it->dev, &state, middle, PAGE_SIZE, DMA_TO_DEVICE, 0);
	expect_read(test, state.addr, p->copy, middle);
	expect_read(test, state.addr + middle + PAGE_SIZE,
		    p->copy + middle + PAGE_SIZE, middle - PAGE_SIZE);
	dma_iova_destroy(it->dev, &state, 0, DMA_TO_DEVICE, 0);
}

/* One page after the other, each waited for, as page faults are */
static void iova_test_count_faults(struct kunit *test)
{
	struct iova_test *it = test->priv;
	struct pages *p = alloc_scattered(test, NR_COUNTED);
	struct dma_iova_state state;
	unsigned int i;

	alloc_counted(test, &state, TAG_FAULTS);
	for (i = 0; i < NR_COUNTED; i++) {
		KUNIT_ASSERT_EQ(test, 0, link_page(test, &state, p, i));
		KUNIT_ASSERT_EQ(test, 0, dma_iova_sync(it->dev, &state,
						       i * PAGE_SIZE,
						       PAGE_SIZE));
	}
	expect_read(test, state.addr, p->copy, NR_COUNTED * PAGE_SIZE);
	dma_iova_destroy(it->dev, &state, 0, DMA_TO_DEVICE, 0);
}

/* The same pages, with one wait */
static void iova_test_count_batch(struct kunit *test)
{
	struct iova_test *it = test->priv;
	struct pages *p = alloc_scattered(test, NR_COUNTED);
	struct dma_iova_state state;

	alloc_counted(test, &state, TAG_BATCH);
	link_all(test, &state, p);
	expect_read(test, state.addr, p->copy, NR_COUNTED * PAGE_SIZE);
	dma_iova_destroy(it->dev, &state, 0, DMA_TO_DEVICE, 0);
}

/* A scatterlist, mapped in one step, may take the same way underneath */
static void iova_test_sg_of(struct kunit *test, unsigned int nr)
{
	struct iova_test *it = test->priv;
	struct pages *p = alloc_scattered(test, nr);
	struct sg_table sgt;

	KUNIT_ASSERT_EQ(test, 0,
			sg_alloc_table_from_pages(&sgt, p->page, nr, 0,
						  nr * PAGE_SIZE, GFP_KERNEL));
	KUNIT_ASSERT_EQ(test, 0, dma_map_sgtable(it->dev, &sgt, DMA_TO_DEVICE,
						 0));
	if (sgt.nents == 1)
		expect_read(test, sg_dma_address(sgt.sgl), p->copy,
			    nr * PAGE_SIZE);
	dma_unmap_sgtable(it->dev, &sgt, DMA_TO_DEVICE, 0);
	sg_free_table(&sgt);
}

static void iova_test_sg(struct kunit *test)
{
	iova_test_sg_of(test, NR_LARGE);
}

/* To be counted too: no other test maps that much at once without a tag */
static void iova_test_count_sg(struct kunit *test)
{
	iova_test_sg_of(test, NR_COUNTED);
}

static int iova_test_suite_init(struct kunit_suite *suite)
{
	dma_cap_mask_t mask;

	dma_cap_zero(mask);
	dma_cap_set(DMA_MEMCPY, mask);
	chan = dma_request_channel(mask, NULL, NULL);
	return 0;
}

static void iova_test_suite_exit(struct kunit_suite *suite)
{
	if (chan)
		dma_release_channel(chan);
}

static int iova_test_init(struct kunit *test)
{
	struct iova_test *it;

	if (!chan)
		kunit_skip(test, "no DMA engine that copies memory");

	it = kunit_kzalloc(test, sizeof(*it), GFP_KERNEL);
	if (!it)
		return -ENOMEM;
	it->dev = dmaengine_get_dma_device(chan);
	it->granule = dma_get_merge_boundary(it->dev) + 1;
	test->priv = it;

	if (!has_iova_space(it->dev))
		kunit_skip(test, "the DMA engine is not behind an IOMMU");
	return 0;
}

static struct kunit_case iova_test_cases[] = {
	KUNIT_CASE(iova_test_alloc),
	KUNIT_CASE(iova_test_link_small),
	KUNIT_CASE(iova_test_link_large),
#ifdef LINKS_PIECES
	KUNIT_CASE(iova_test_link_vec),
#endif
	KUNIT_CASE(iova_test_write),
	KUNIT_CASE(iova_test_unaligned),
	KUNIT_CASE(iova_test_untrusted),
	KUNIT_CASE(iova_test_relink),
	KUNIT_CASE(iova_test_split),
	KUNIT_CASE(iova_test_holes),
	KUNIT_CASE(iova_test_refused),
	KUNIT_CASE(iova_test_refused_apart),
	KUNIT_CASE(iova_test_refused_order),
	KUNIT_CASE(iova_test_no_memory),
	KUNIT_CASE(iova_test_memory_short),
	KUNIT_CASE(iova_test_exhaustion),
	KUNIT_CASE(iova_test_owned),
	KUNIT_CASE(iova_test_two_cpus),
	KUNIT_CASE(iova_test_sg),
	KUNIT_CASE(iova_test_count_many),
	KUNIT_CASE(iova_test_count_faults),
	KUNIT_CASE(iova_test_count_batch),
	KUNIT_CASE(iova_test_count_sg),
	{}
};

static struct kunit_suite iova_test_suite = {
	.name = "dma_iova",
	.suite_init = iova_test_suite_init,
	.suite_exit = iova_test_suite_exit,
	.init = iova_test_init,
	.test_cases = iova_test_cases,
};

kunit_test_suite(iova_test_suite);

MODULE_DESCRIPTION("Tests of the DMA API in two steps");
MODULE_LICENSE("GPL");
